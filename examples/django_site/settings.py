"""The site's settings; TQE's stand among them, as those of other libraries do."""

import os

SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY", "only for this example")
INSTALLED_APPS = ["examples.django_site"]
ROOT_URLCONF = "examples.django_site.views"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
ALLOWED_HOSTS = ["*"]
DATABASES = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ.get("SITE_DB", "site.sqlite3")}
}

# The weakest source: tqe.toml, TQE_* variables and the command line override it.
TQE = {"lanes": ("mail", "normal", "reports"), "max_retries": 5, "log_format": "json"}
