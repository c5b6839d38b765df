"""Patterns that texts of a recipe have to match, and in words what they ask for."""

STAGE_NAME = r"^[a-z0-9]([a-z0-9._-]*[a-z0-9_-])?$"  # also names a folder
ADDRESS = r"^https?://[^\s?#]+$"

SPELLED = {
    STAGE_NAME: "a name of small letters, digits, '.', '_' and '-' that begins with a letter or digit and does not end in '.'",
    ADDRESS: "the address of an endpoint, such as http://localhost:8000/v1: with http:// or https:// before it, and without '?', "
    "'#' and spaces",
}
