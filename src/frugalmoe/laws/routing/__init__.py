"""Laws that every routing strategy obeys, by what they are about.

A law is a function `law_NAME` of one of these modules: it takes a case and asserts. What a strategy declares about
itself decides which side of a law must hold.
"""

from frugalmoe.laws.routing import dependence, execution, gradients, losses, plan, state

LAWS = {
    name.removeprefix("law_"): law
    for module in (dependence, plan, gradients, losses, state, execution)
    for name, law in vars(module).items()
    if name.startswith("law_")
}
