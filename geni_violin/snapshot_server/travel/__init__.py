"""Snapshots that travel: out into one file, and in from one.

Theory of operation. An archive is a page store of one snapshot, its objects one after the other in one file
(``archive_format``). To export is to copy the snapshot from the server's store into a page store whose backend writes
an archive; to import is to copy it from a page store whose backend reads one. So an archive has each page once, has the
same packs, image maps and checksums as any store, and no code of its own that could understand them differently.

An archive goes out while it is made. One that comes in is first kept whole in a scratch file; then *everything* of it
is checked: the container, each object's checksum, and by the store's own ``verify`` every page, before the server's
store hears of it. Then it is staged, copied and published like any snapshot, so it is there whole or not at all.

For programs that know nothing of this project there are two other forms, of one VM each: the bare migration stream, and
a file of ``virsh save``. Nothing can be imported from them: they are without network and channel state.

==================  ==================================================================================================
``archive_format``  the container, byte for byte (pure)
``archive_out``     a backend that writes an archive
``archive_in``      a backend that reads one
``copying``         a snapshot from one store to another
``exporting``       a snapshot as a stream of bytes, in any form
``importing``       an archive that came in: check, then copy
``domain_xml``      the domain of a VM, for libvirt (pure)
==================  ==================================================================================================
"""
