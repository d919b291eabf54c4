"""What every test may count on."""

import signal

# A shell that starts us in the background has SIGINT ignored, and so would every program that a test
# starts and then interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
