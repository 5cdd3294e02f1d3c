"""The operators that rewritten graphs are made of. Importing this package registers all of them."""

import kvrewrite.ops.attention
import kvrewrite.ops.decode
import kvrewrite.ops.latent
import kvrewrite.ops.linear
import kvrewrite.ops.quantized
import kvrewrite.ops.recall
import kvrewrite.ops.rotary
import kvrewrite.ops.scores
import kvrewrite.ops.state
import kvrewrite.ops.sums
import kvrewrite.ops.together
import kvrewrite.ops.update  # noqa: F401
