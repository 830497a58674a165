"""Measurements against the alternatives, and the demo that trains a small model under each policy.

One harness (`run`) measures operations (`operations`, `registry`) as others (`ways`, `peers`) and
we (`own`) compute them, with the clocks and counters of `measure`; `rows` keeps what it found,
`report` shows it. `kernels` and `doctor` look at the kernels one by one (`kernel_cases`),
`static_report` at what the compilers make of them; `demo` is the training run, `data` its text.
"""
