"""A conversation with a trained model in the terminal."""

from kinkajou.chat.talker import Answer, Talker
from kinkajou.chat.terminal import talk

__all__ = ["Answer", "Talker", "talk"]
