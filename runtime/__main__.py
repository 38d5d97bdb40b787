"""`python -m runtime DIR OUT`: export a model to Hugging Face's layout."""

from runtime import run
from runtime.weights import main

run(main)
