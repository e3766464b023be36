"""Configs that come with the package: <method>/<dataset>.yaml."""
