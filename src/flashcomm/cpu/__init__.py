"""The codec for CPUs: `wire.torch_codec`, compiled for the machine it runs on. Same arguments, same bits.

How it works. A kernel is made at first use for one dtype, one format and one length of a row's last group. It treats a
group of, say, 64 values as *one* LLVM vector: `a * b` multiplies 64 lanes. LLVM accepts vectors of any length and
splits them into the registers of this CPU (SSE, AVX2, AVX-512, NEON). With loops instead of vectors, a vectorizer would
have to prove that arrays do not overlap and to guess how often a loop runs. For short groups it would give up.

    codec.py     encode and decode_sum: checks, threads, addresses
    encode.py    the encoder of one format            decode.py    the decoder, which also adds up the ranks
    quantize.py  scales, zero points and codes        hadamard.py  the transform
    groups.py    loops over groups, number formats    lanes.py     sums and maxima over lanes
    vector.py    LLVM vectors with Python's operators
    jit.py       from LLVM's assembly to a function
"""
