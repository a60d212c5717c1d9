"""The HTTP side: checkout, and a look at an order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel, PositiveInt
from sheppy import Queue
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from .database import backend, engine, transaction
from .tables import Order, Receipt
from .tasks import send_receipt

# scope="function": the transaction is committed before the response is sent, so that 201 means
# "stored", and a commit that fails is a 500. FastAPI's default would commit after the response.
Transaction = Annotated[AsyncSession, Depends(transaction, scope="function")]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await backend.connect()
    yield
    await backend.disconnect()
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


class NewOrder(BaseModel):
    id: UUID  # made by the client, who may repeat a request that was not answered
    email: str
    total: PositiveInt  # cents
    card: str


class OrderStatus(BaseModel):
    id: UUID
    total: int
    receipt_sent: bool


@app.post("/orders", status_code=201)
async def place_order(new: NewOrder, session: Transaction) -> OrderStatus:
    """Store an order, and the task that sends its receipt, in one transaction."""
    if await session.get(Order, new.id) is None:
        session.add(Order(id=new.id, email=new.email, total=new.total))
        try:
            await session.flush()
        except IntegrityError:
            raise HTTPException(409, "This order is being placed by another request") from None
        await Queue(backend.bind(session), "emails").add(send_receipt(new.id))
        if not await authorise(new.card, new.total):
            # Rolls back the order and its task.
            raise HTTPException(402, "The card was declined")
    return await show_order(new.id, session)


@app.get("/orders/{order_id}")
async def show_order(order_id: UUID, session: Transaction) -> OrderStatus:
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, "There is no such order")
    receipt = await session.get(Receipt, order_id)
    return OrderStatus(id=order.id, total=order.total, receipt_sent=receipt is not None)


async def authorise(card: str, total: int) -> bool:
    """Stands for the card company, which takes its time, and may decline.

    It only reserves the money. Of an order that is not committed in the end, that expires.
    """
    await asyncio.sleep(0.02)
    return card != "declined"
