"""The page store: images as pages that are kept once, across VMs, snapshots and slices.

Theory of operation. What a store keeps are *items*: pages of 4096 bytes, and pieces of up to 1 MiB of what is not pages
(the state of devices; streams that are not understood). An item is known by its BLAKE3-256, the *digest*. All 32 bytes
are kept: guests choose what their pages hold, and whoever finds two pages of one digest could read into another guest's
image. 16 bytes would leave a collision within reach of a determined attacker, and the 16 saved are 1 % of a page.

An image is a *map*: which digest, or which fill byte, each page of the guest's memory has. A page full of one byte
costs nothing but its place in the map. Items come in *frames* of zstd, frames in *packs*: large immutable objects, each
with a table of what is in it. The *index* tells where each digest is. It is made of these tables, and of nothing else.

What happens to a run of pages, in this order: digests; those that the index has, or that are on their way by any
stream, are done with; the rest fill a frame, shared by all streams, that a worker compresses and puts at the end of the
open pack. A full pack is put by another worker. An image is durable when all packs that it needs are, and then its map.

Three orders make crashes harmless. Packs are durable before a map names their items; maps before a manifest names them;
a manifest is gone before its maps go, and a map before its packs. What no manifest or staging names is rubbish: maps go
at the next start, and packs then, or with the next :meth:`~.page_store.PageStore.delete` or collection.

=================  ===================================================================================================
``digests``        BLAKE3 of many items
``pack_format``    packs, byte for byte (pure)
``image_map``      image maps, byte for byte (pure); ``map_builder`` makes one from a stream's events
``index``          where each digest is, in sorted arrays; ``index_cache`` keeps it across restarts
``catalog``        the packs that there are, their index, and the lock that guards both
``packer``         items to durable packs, by worker threads; ``pack_builder`` is a pack in the making
``image_writer``   one image on its way in
``frames``         frames out of packs, ahead of their use
``image_reader``   one image on its way out
``verifier``       everything of an image read back
``usage``          which packs are needed, and by whom
``collector``      rubbish: plan, then execute; ``tally`` counts who needs what
``stats``          what snapshots take, and what they share
``page_words``     what people call some pages (pure)
``documents``      small JSON objects that tell when they are damaged (pure); ``manifests`` are such
``channel_states`` the channel states of snapshots, as objects
``stagings``       what is staged, in a local folder
``quotas``         how much a slice's snapshots may have
``refusals``       what is refused of a staging (pure)
``gate``           what is being changed ends before the store is closed
``opening``        locks, what kind of store it is, and the index
``page_store``     all of it behind :class:`~geni_violin.snapshot_server.store.ImageStore`
=================  ===================================================================================================
"""
