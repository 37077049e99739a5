"""Generators that take turns."""


def results_in_turn(generators):
    """Advances each in turn until all have ended; what they return, in their order."""
    left, results = dict(enumerate(generators)), {}
    while left:
        for index, generator in list(left.items()):
            try:
                next(generator)
            except StopIteration as end:
                results[index] = end.value
                del left[index]
    return [results[index] for index in sorted(results)]
