"""The snapshot server: swallows QEMU's migration streams, keeps them, gives them back.

Theory of operation. To QEMU a snapshot is a live migration to nowhere; this is the nowhere. The way of an image:

1. The coordinator *stages* a snapshot: its name is taken, there is room for it, and each VM gets a token.
2. Each host agent opens a TCP connection, says its token, and hands the connection to QEMU. What comes is taken apart
   into pages and the state of devices; pages that the store does not have go into packs. At the end of the connection
   all packs that the image needs are made durable, and then its map. Only then is the image *durable*, and only then
   does the server say so.
3. Where frames were held, each host agent brings what the edges of its VMs recorded, and the coordinator has the
   channel states *sealed*: the frames that were in transit to each VM, which a restore replays to it.
4. The coordinator *publishes* the manifest, in one atomic step. A snapshot exists if and only if its manifest does.

What holds after any crash, because of that order: a snapshot that is listed is whole; what is not listed costs nothing
but a clean-up at the next start. Whether a stream is whole only its sender knows (a killed QEMU closes its connection
just like a finished one), so the host agent tells the coordinator; *durable* means that these bytes are safe, no more.

=================  ===================================================================================================
``names``          what may be a name, so that no path leaves the store; checks of what is asked (pure)
``store``          the interface that any store has, and when a manifest may be published (pure)
``stream``         QEMU's migration stream, to events and back (pure)
``pages``          the store: pages that are kept once
``backends``       where its objects are: a folder, or S3
``travel``         snapshots out of a store and into another
``records``        small local files, and what the disk's errors mean
``channels``       which frames are in transit to each VM (pure)
``cut_clock``      the guest's clock at its cut, read from its image (pure)
``desk``           which images are awaited, by token, and how far each is (in memory only)
``stream_guard``   what is refused of a stream (pure)
``ingest``         the TCP side: put and get
``api``            the REST side
``server``         the process
=================  ===================================================================================================
"""
