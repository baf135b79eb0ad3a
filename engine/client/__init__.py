"""The clients: what submits jobs and reads what became of them, in a sync and an async way."""

from tqe.client.aio import AsyncClient
from tqe.client.handles import AsyncJobHandle, AsyncJobHandles, JobHandle, JobHandles
from tqe.client.payloads import submission_from_json, submissions_from_lines
from tqe.client.sync import Client

__all__ = [
    "AsyncClient",
    "AsyncJobHandle",
    "AsyncJobHandles",
    "Client",
    "JobHandle",
    "JobHandles",
    "submission_from_json",
    "submissions_from_lines",
]
