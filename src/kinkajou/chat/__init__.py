"""A conversation with a trained model in the terminal."""

from kinkajou.chat.screen import Screen, Unheard
from kinkajou.config import ChatConfig


def talk(folder: str, cfg: ChatConfig) -> None:
    """`kinkajou chat`: says that it loads before torch is imported, which takes seconds."""
    screen = Screen()
    try:
        screen.passing(f"loading {folder} ...")
        try:
            from kinkajou.chat.terminal import begin

            begin(folder, cfg, screen)
        finally:
            screen.passing("")
    except Unheard as fault:
        fault.leave()
