"""A stand-in for SGLang 0.5.23, written from reading it: names, signatures and order of calls that the plugin meets.

What is not here: CUDA, its fast all-reduces (gloo reduces in their place, in their order), models. CPU tensors take the
path that CUDA tensors take there. Versions and entry points come from a .dist-info that the tests write.
"""
