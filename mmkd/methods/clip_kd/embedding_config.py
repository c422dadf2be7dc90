"""Settings of method clip_kd about caches of a teacher's embeddings."""

from dataclasses import dataclass, field

from mmkd.cache.embedding_codec import EMBEDDING_DTYPES
from mmkd.field_docs import DocumentedFields
from mmkd.schema import PositiveInt


@dataclass
class EmbeddingCacheConfig(DocumentedFields):
    """Settings of `mmkd cache build` for pairs."""

    cache_views: PositiveInt = field(
        default=1,
        metadata={
            "help": "For `mmkd cache build`. Views of each picture to keep embeddings of, drawn by `augmentation`; "
            "training shows the student one of them per epoch. DataCompDR keeps 10 to 30. Default: 1."
        },
    )
    cache_embedding_dtype: str = field(
        default="float16",
        metadata={
            "help": "For `mmkd cache build`. The type that embeddings are kept in. float16 (default) changes a cosine "
            "by about 1e-4; float32 takes twice the room.",
            "choices": list(EMBEDDING_DTYPES),
        },
    )
