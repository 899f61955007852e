"""JSON schemas of the parts of JobSet and SkyPilot that the templates of moejax launch use.

What is not named here is refused: a field that is added to a template is looked up and added here.
"""

from typing import Any

_NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
_COUNT = {"type": "integer", "minimum": 1}
_TEXT = {"type": "string", "minLength": 1}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_TEXTS = {"type": "object", "additionalProperties": _TEXT, "minProperties": 1}

_CONTAINER = _object(
    {
        "name": _NAME,
        "image": _TEXT,
        "command": _list({"type": "string"}),
        "resources": _object(
            {
                "limits": {
                    "type": "object",
                    "propertyNames": {"enum": ["google.com/tpu", "nvidia.com/gpu"]},
                    "additionalProperties": _COUNT,
                }
            }
        ),
        "volumeMounts": _list(_object({"name": _NAME, "mountPath": _TEXT})),
    },
    {
        "env": _list(
            {
                "oneOf": [
                    _object({"name": _TEXT, "value": _TEXT}),
                    _object(
                        {
                            "name": _TEXT,
                            "valueFrom": _object({"fieldRef": _object({"fieldPath": _TEXT})}),
                        }
                    ),
                ]
            }
        )
    },
)

_VOLUME = {
    "oneOf": [
        _object({"name": _NAME, "emptyDir": _object({"medium": {"const": "Memory"}})}),
        _object(
            {
                "name": _NAME,
                "csi": _object(
                    {
                        "driver": {"const": "gcsfuse.csi.storage.gke.io"},
                        "volumeAttributes": _object({"bucketName": _TEXT, "mountOptions": _TEXT}),
                    }
                ),
            }
        ),
    ]
}

_POD = _object(
    {
        "restartPolicy": {"const": "Never"},
        "serviceAccountName": _NAME,
        "terminationGracePeriodSeconds": _COUNT,
        "nodeSelector": _TEXTS,
        "containers": _list(_CONTAINER),
        "volumes": _list(_VOLUME),
    }
)

_JOB = _object(
    {
        "parallelism": _COUNT,
        "completions": _COUNT,
        "completionMode": {"const": "Indexed"},
        "backoffLimit": {"const": 0},
        "podFailurePolicy": _object(
            {
                "rules": _list(
                    _object(
                        {
                            "action": {"enum": ["FailJob", "Ignore", "Count", "FailIndex"]},
                            "onExitCodes": _object(
                                {
                                    "containerName": _NAME,
                                    "operator": {"enum": ["In", "NotIn"]},
                                    "values": _list(_COUNT),
                                }
                            ),
                        }
                    )
                )
            }
        ),
        "template": _object({"metadata": _object({"annotations": _TEXTS}), "spec": _POD}),
    }
)

# jobset.x-k8s.io/v1alpha2, with batch/v1 and core/v1 inside.
JOBSET = _object(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": _object({"name": _NAME}, {"annotations": _TEXTS}),
        "spec": _object(
            {
                "failurePolicy": _object(
                    {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": _list(
                            _object(
                                {
                                    "name": _NAME,
                                    "action": {
                                        "enum": [
                                            "FailJobSet",
                                            "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts",
                                        ]
                                    },
                                    "onJobFailureReasons": _list(
                                        {"enum": ["BackoffLimitExceeded", "PodFailurePolicy"]}
                                    ),
                                }
                            )
                        ),
                    }
                ),
                "replicatedJobs": _list(
                    _object(
                        {"name": _NAME, "replicas": _COUNT, "template": _object({"spec": _JOB})}
                    )
                ),
            }
        ),
    }
)

SKYPILOT = _object(
    {
        "name": _NAME,
        "workdir": _TEXT,
        "num_nodes": _COUNT,
        "resources": _object(
            {
                "accelerators": {"type": "string", "pattern": "^[A-Z0-9-]+(GB)?:[1-8]$"},
                "use_spot": {"type": "boolean"},
                "job_recovery": _object(
                    {"max_restarts_on_errors": {"type": "integer", "minimum": 0}}
                ),
            }
        ),
        "file_mounts": {
            "type": "object",
            "propertyNames": {"pattern": "^/"},
            "additionalProperties": _object(
                {
                    "source": {"type": "string", "pattern": "^gs://[^/]+$"},
                    "mode": {"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
                }
            ),
        },
        "setup": _TEXT,
        "run": _TEXT,
    }
)
