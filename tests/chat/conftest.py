"""The fixtures of `chatting`."""

from chatting import asked, folder, rival, speaker, talk

__all__ = ["asked", "folder", "rival", "speaker", "talk"]
