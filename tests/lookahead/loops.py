"""A server and a session in one event loop, for tests that answer their own requests."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web


@asynccontextmanager
async def listening(handler):
    """A server in this loop; yields its URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def in_session(function):
    """Run it, and nothing may go on afterwards."""

    async def main():
        async with aiohttp.ClientSession() as session:
            found = await function(session)
            await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return found

    return asyncio.run(main())
