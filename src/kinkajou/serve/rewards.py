"""Routes of rewards."""

from fastapi import APIRouter

from kinkajou.serve.house import House


def router(house: House) -> APIRouter:
    return APIRouter()
