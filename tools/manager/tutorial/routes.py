"""POST /api/tutorial/{figure}: what each figure takes, and within which limits.

    app.include_router(router(Worker(), folder_of))

folder_of: id of weights -> their folder; raises Problem for an unknown one. "tiny" is a random
model.
torch is never imported here: worker.py runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from tools.manager.tutorial.client import Worker

LONGEST = 400  # characters of a text
SIZES = ("26m", "104m", "145m-moe", "64m", "198m-moe", "tiny", "tiny-moe")

Text = Annotated[str, Field(min_length=1, max_length=LONGEST)]
Reward = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]
Change = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class Figure(BaseModel):
    """weights: an id of GET /api/weights, or "tiny"."""

    model_config = ConfigDict(extra="forbid")
    weights: str = Field("tiny", max_length=100)


class Tokens(Figure):
    text: Text


class Embedding(Tokens):
    """chosen: which token of the text, by its place."""

    chosen: int = Field(0, ge=0, lt=LONGEST)


class AttentionMap(Tokens):
    layer: int = Field(0, ge=0, lt=200)
    head: int = Field(0, ge=0, lt=200)


class Rope(Figure):
    position: int = Field(8, ge=0, le=4096)
    distance: int = Field(4, ge=0, le=4096)


class Experts(Tokens):
    layer: int = Field(0, ge=0, lt=200)


class NextToken(Tokens):
    temperature: float = Field(1.0, ge=0.05, le=5)
    top_k: int = Field(0, ge=0, le=200)
    top_p: float = Field(1.0, ge=0.05, le=1)


class RowLoss(Figure):
    question: Text
    answer: Text


class Dpo(Figure):
    """gained_*: by how much training has changed the log-probability of an answer."""

    prompt: Text
    chosen: Text
    rejected: Text
    beta: float = Field(0.15, ge=0.01, le=5)
    gained_chosen: Change = 0.0
    gained_rejected: Change = 0.0


class Rl(Figure):
    rewards: list[Reward] = Field(min_length=2, max_length=16)


class ToolCall(Figure):
    """call: what the model writes between the tags of a call."""

    question: Text
    call: str = Field(max_length=LONGEST)


class Deploy(Figure):
    size: Literal[SIZES] = "26m"
    context: int = Field(2048, ge=1, le=32768)
    batch: int = Field(1, ge=1, le=256)


def router(worker: Worker, folder_of: Callable[[str], Path]) -> APIRouter:
    routes = APIRouter(prefix="/api/tutorial", tags=["tutorial"])

    def computed(name: str, figure: Figure) -> dict:
        fields = figure.model_dump()
        if figure.weights != "tiny":
            fields["weights"] = str(folder_of(figure.weights))
        return worker.ask(name, fields)

    # plain functions: FastAPI runs them in threads, where they may wait for the worker
    @routes.post("/tokens")
    def tokens(figure: Tokens) -> dict:
        return computed("tokens", figure)

    @routes.post("/embedding")
    def embedding(figure: Embedding) -> dict:
        return computed("embedding", figure)

    @routes.post("/attention")
    def attention(figure: AttentionMap) -> dict:
        return computed("attention", figure)

    @routes.post("/rope")
    def rope(figure: Rope) -> dict:
        return computed("rope", figure)

    @routes.post("/experts")
    def experts(figure: Experts) -> dict:
        return computed("experts", figure)

    @routes.post("/next_token")
    def next_token(figure: NextToken) -> dict:
        return computed("next_token", figure)

    @routes.post("/row_loss")
    def row_loss(figure: RowLoss) -> dict:
        return computed("row_loss", figure)

    @routes.post("/dpo")
    def dpo(figure: Dpo) -> dict:
        return computed("dpo", figure)

    @routes.post("/rl")
    def rl(figure: Rl) -> dict:
        return computed("rl", figure)

    @routes.post("/tools")
    def tools(figure: ToolCall) -> dict:
        return computed("tools", figure)

    @routes.post("/deploy")
    def deploy(figure: Deploy) -> dict:
        return computed("deploy", figure)

    return routes
