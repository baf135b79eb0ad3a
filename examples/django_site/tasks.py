"""The site's tasks: `tqe run examples.django_site.tasks:app`."""

import os

import django
from django.apps import apps
from django.conf import settings
from django.db import close_old_connections, connections

from tqe import App

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.django_site.settings")
if not apps.ready:  # in a worker nobody else has done it
    django.setup()

app = App("site", **settings.TQE)


@app.on_worker_start
def own_connections() -> None:
    """A connection that was opened before the fork belongs to the parent."""
    connections.close_all()


@app.on_worker_stop
def disconnect() -> None:
    connections.close_all()


@app.task("WELCOME", priority="mail", max_retries=3)
def welcome(signup_id: int) -> str:
    """Ids travel, not objects: the row is read when the job runs."""
    from examples.django_site.models import Signup

    close_old_connections()  # one that the server has closed meanwhile is opened anew
    signup = Signup.objects.get(pk=signup_id)
    if not signup.welcomed:  # a job may run twice
        signup.welcomed = True
        signup.save(update_fields=["welcomed"])
    return f"Welcome, {signup.email}!"
