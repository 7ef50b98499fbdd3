"""The exceptions that flashcomm raises.

    FlashcommError
    ├── FormatError         a format string or a group size that does not exist       (also a ValueError)
    ├── SettingsError       an argument or FLASHCOMM_* value that is not allowed,
    │                       or one that differs between ranks                         (also a ValueError)
    ├── InputError          a tensor that cannot be reduced, or ranks that called
    │                       with different shapes, dtypes or operations               (also a ValueError)
    ├── PlanError           a plan that cannot be read, or that is for another model  (also a ValueError)
    ├── UnavailableError    a transport, device or package that was requested and is not available here
    ├── CommunicationError  a peer died, or did not answer within the time-out
    └── ClosedError         a Communicator was used after close()

Each message says what was asked, what is allowed and what to do. In a collective, every rank of the group raises the
same error.
"""


class FlashcommError(RuntimeError):
    """Base of all errors raised by flashcomm."""


class FormatError(FlashcommError, ValueError):
    """A wire format that does not exist."""


class SettingsError(FlashcommError, ValueError):
    """A setting that is not allowed, or that is not the same on every rank."""


class InputError(FlashcommError, ValueError):
    """A tensor that the call does not support, or calls that differ between ranks."""


class PlanError(FlashcommError, ValueError):
    """A plan (formats by layer) that cannot be read or does not fit the model."""


class UnavailableError(FlashcommError):
    """A transport, device or package that was requested and is not available here."""


class CommunicationError(FlashcommError):
    """A peer died or did not answer within the time-out."""


class ClosedError(FlashcommError):
    """A Communicator was used after close()."""
