"""Files of masks, as every verb that takes `masks=FOLDER` reads them: see `selfsup.data.mask_files`."""

from selfsup.data.mask_files import IDS as IDS
from selfsup.data.mask_files import SUFFIXES as SUFFIXES
from selfsup.data.mask_files import files as files
from selfsup.data.mask_files import find as find
from selfsup.data.mask_files import matched as matched
from selfsup.data.mask_files import read_ids as read_ids
