"""docs/configuration.md on standard output: python -m advgrpo.config > docs/configuration.md"""

from advgrpo.config.help import reference_page
from advgrpo.config.sections import Config

print(reference_page(Config))
