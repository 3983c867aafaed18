"""The smallest API of FastAPI."""

from fastapi import FastAPI

api = FastAPI(openapi_url=None)


@api.get("/")
async def hello():
    return {"hello": "World"}
