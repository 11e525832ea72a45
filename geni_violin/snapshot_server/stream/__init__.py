"""QEMU's migration stream, read and written without any I/O.

Theory of operation. A stream is a preamble (header, configuration, and the setup of RAM: which blocks there are), then
records of pages, then the state of all devices. The reader turns it into events, whatever the pieces in which it comes:
a :class:`~.events.Preamble`, then :class:`~.events.PageRun` and :class:`~.events.FillRun`, then one
:class:`~.events.Tail`. The writer makes from these a stream that QEMU loads to the same state: another one, because a
page that came twice is written once, and in another order.

What the reader does not know (another magic, compressed pages, postcopy, a second kind of iterable section) is no
error. From there on it gives out :class:`~.events.Opaque` pieces: whatever brought the receiving QEMU to the state that
it had at that place can be followed by them.

=================  ===================================================================================================
``events``         what a stream consists of, for those who keep it
``layout``         QEMU's numbers, and the limits that this package sets
``preamble``       everything before the first page
``batch``          ascending pages, collected and given out together
``records``        the records of pages, many at a time
``ending``         what comes after the pages: whether it is whole
``reader``         bytes to events
``writer``         events to bytes
``libvirt_file``   what libvirt puts in front of a stream in a file of ``virsh save``
=================  ===================================================================================================
"""
