"""The errors a user can meet, and the exit code each one ends a command with.

```text
ClipscaleError
├── RequestError            exit 2: the request cannot be served as it stands; nothing was started or written
│   ├── ConfigError         a setting is unknown, has the wrong type, or contradicts another
│   ├── DataError           a data set or manifest is missing, empty or not what the request says
│   ├── RunFolderError      the run folder holds another run, or cannot be written
│   └── MissingPackage      an optional package is needed; the message holds the install line
└── RunError                exit 1: the request was right, the run failed
    ├── ShardError          a shard or one of its samples cannot be read
    ├── CheckpointError     a checkpoint is damaged or does not fit the model
    ├── ContrastError       ranks disagree about the batch, or features are unusable
    │   └── NonFiniteFeatures   embeddings, or numbers beside them, are not finite
    ├── NonFiniteLoss       the loss or a gradient stopped being a number
    ├── ReplicasDiffer      copies of the weights on several ranks are no longer the same bits
    └── OutOfMemory         a device's memory ran out; says in which phase of a step, and what to lower
```

Every message says what was asked, what was found and what to do.
"""


class ClipscaleError(Exception):
    """The root: everything clipscale raises on purpose."""

    exit_code = 1


class RequestError(ClipscaleError):
    """The request cannot be served as it stands; known before any work starts."""

    exit_code = 2


class ConfigError(RequestError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class DataError(RequestError):
    """A data set or manifest is missing, empty, or not what the request says."""


class RunFolderError(RequestError):
    """The run folder holds another run, or cannot be written."""


class MissingPackage(RequestError):
    """An optional package is needed for this request."""


class RunError(ClipscaleError):
    """The request was right, but the run failed."""


class ShardError(RunError):
    """A shard, or a sample in it, cannot be read."""


class CheckpointError(RunError):
    """A checkpoint is damaged or does not fit the model."""


class ContrastError(RunError):
    """Ranks disagree about the batch, or the features cannot be contrasted."""


class NonFiniteFeatures(ContrastError):
    """Embeddings of some rank, or numbers beside them, are not finite."""


class NonFiniteLoss(RunError):
    """The loss or a gradient is not a finite number."""


class ReplicasDiffer(RunError):
    """Copies of the weights on several ranks are no longer the same bits."""


class OutOfMemory(RunError):
    """A device's memory ran out."""
