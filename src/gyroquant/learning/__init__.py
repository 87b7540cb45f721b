"""Learned rotations: what is learned, by which objective, and the steps on the manifold of rotations."""

from gyroquant.learning.finish import Finish, finish
from gyroquant.learning.learn import learn
from gyroquant.learning.settings import Learn

__all__ = ["Finish", "Learn", "finish", "learn"]
