"""A Django site that submits jobs: settings, a model, a view and tasks, each in its usual place."""
