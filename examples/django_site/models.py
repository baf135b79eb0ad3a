"""What the site stores."""

from django.db import models


class Signup(models.Model):
    """Somebody who wants our mails."""

    email = models.EmailField(unique=True)
    welcomed = models.BooleanField(default=False)

    class Meta:
        app_label = "django_site"
