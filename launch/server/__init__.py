"""`tp-mamba serve`: completions over HTTP in OpenAI's shape; only this package imports fastapi, uvicorn and pydantic.

Two threads of rank 0 share the work. The main thread runs an asyncio loop: uvicorn, the routes (:mod:`app`), what is in
flight (:mod:`service`), signals (:mod:`run`). One more thread owns the engine (:mod:`stepping`): it takes commands from
a queue, steps, and hands events back to the loop. The other ranks follow it (:mod:`tp_mamba.engine.leader`).
"""
