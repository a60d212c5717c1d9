"""The application: orders, for each of which a receipt is to be sent."""

from __future__ import annotations

from sheppy import task
from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Session = AsyncSession | AsyncConnection

EMAILS = "emails"


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)


@task
async def send_receipt(order_id: int) -> str:
    return f"sent for {order_id}"


async def place_order(session: Session, order_id: int) -> None:
    await session.execute(insert(Order).values(id=order_id))


async def count_orders(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return await connection.scalar(select(func.count()).select_from(Order)) or 0
