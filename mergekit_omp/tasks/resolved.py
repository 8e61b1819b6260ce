"""Declare fields of tasks that have an object of the resolved recipe."""

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic_core import core_schema

Object = TypeVar("Object")

if TYPE_CHECKING:
    Resolved = Annotated[Object, ...]
else:

    class Resolved:
        """An instance of a class, like ``pydantic.InstanceOf``, which also makes schemas of all its attributes."""

        def __class_getitem__(cls, item: type) -> Any:
            """Return the annotation of a field."""
            return Annotated[item, cls()]

        @classmethod
        def __get_pydantic_core_schema__(cls, source: type, _handler: object) -> core_schema.CoreSchema:
            """Accept instances alone."""
            return core_schema.is_instance_schema(source)
