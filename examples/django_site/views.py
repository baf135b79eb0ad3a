"""The site's one page, and its address."""

from functools import partial

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path

from examples.django_site.models import Signup
from examples.django_site.tasks import welcome


@transaction.atomic
def sign_up(request: HttpRequest) -> JsonResponse:
    """The job is submitted once the row is there for others to see; a rollback submits nothing."""
    signup = Signup.objects.create(email=request.POST["email"])
    once = welcome.with_options(idempotency_key=f"welcome-{signup.pk}")
    transaction.on_commit(partial(once.submit, signup.pk))
    if request.POST.get("fail"):
        raise ValueError("the form is wrong after all")
    return JsonResponse({"id": signup.pk}, status=202)


urlpatterns = [path("signup", sign_up)]
