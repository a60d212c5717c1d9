"""Table and views; the sessions are SQLAlchemy's, as with Flask-SQLAlchemy."""

from __future__ import annotations

from flask import Flask, request
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from sheppy_sql import sync

from .tasks import send_receipt, send_voucher


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]  # cents


class NoVoucherError(Exception):
    """There are none for small orders."""


def create_app(database_url: str) -> Flask:
    app = Flask(__name__)
    engine = create_engine(database_url)
    session = scoped_session(sessionmaker(engine))

    @app.teardown_appcontext
    def close(_error: BaseException | None) -> None:
        # Rolls back what was not committed.
        session.remove()

    @app.post("/orders")
    def place_order() -> tuple[dict[str, object], int]:
        """Store an order and the task that sends its receipt; it runs once they are committed."""
        order = Order(total=int(request.form["total"]))
        session.add(order)
        session.flush()
        receipt = send_receipt(order.id, order.total)
        sync.enqueue(session, "emails", receipt)
        try:
            # A savepoint: without a voucher the order is placed nevertheless.
            with session.begin_nested():
                sync.enqueue(session, "emails", send_voucher(order.id))
                if order.total < 1000:
                    raise NoVoucherError
        except NoVoucherError:
            pass
        if order.total <= 0:
            return {"error": "An order must cost something"}, 400
        number = order.id
        session.commit()
        return {"order": number, "receipt": str(receipt.id)}, 201

    @app.get("/receipts/<task_id>")
    def receipt(task_id: str) -> tuple[str, int]:
        """What the task has returned, once a worker has run it."""
        try:
            done = sync.wait_for(session, "emails", task_id, timeout=20)
        except TimeoutError:
            return "Not yet", 404
        return (done.result if done else ""), 200

    with engine.begin() as connection:
        Base.metadata.create_all(connection)
    return app
