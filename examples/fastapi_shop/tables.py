"""The shop's own tables; `python -m examples.fastapi_shop.tables` makes them."""

from __future__ import annotations

import asyncio
from datetime import datetime
from uuid import UUID

from sqlalchemy import DateTime, ForeignKey, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    email: Mapped[str]
    total: Mapped[int]  # cents
    placed_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


class Receipt(Base):
    """One that was sent. The order's id is its key, so that an order has one at most."""

    __tablename__ = "receipts"

    order_id: Mapped[UUID] = mapped_column(ForeignKey(Order.id), primary_key=True)
    sent_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


async def create() -> None:
    from .database import engine

    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(create())
