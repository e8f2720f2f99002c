def function(op):
    raise NotImplementedError(op)
