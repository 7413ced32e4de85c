"""docs/configuration.md on standard output: python -m advgrpo.config > docs/configuration.md"""

from .help import reference_page
from .sections import Config

print(reference_page(Config))
