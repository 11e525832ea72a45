"""The host agent: one a host. Runs VMs, their ports, and the cut of each.

``agent`` keeps what there is and finds it again after a crash; ``cuts`` and ``cut_runner`` carry out ``core.cut``;
``hypervisor`` is the contract with whatever runs VMs, ``qemu`` the adapter for QEMU; ``ovs`` and ``ports`` are the VMs'
places in the network; ``link_ends`` and ``link_process`` are links with a delay or a loss; ``cleanup`` removes it all.
"""
