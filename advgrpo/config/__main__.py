"""docs/configuration.md on standard output: python -m advgrpo.config > docs/configuration.md"""

from advgrpo.config.config import Config
from advgrpo.config.help import reference_page

print(reference_page(Config))
