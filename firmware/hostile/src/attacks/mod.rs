//! What a driver must never do. Each attack leaves its device in any state; the reset that comes
//! after it must bring the device back.

mod pci;
mod queues;
mod registers;

use crate::function::Function;
use crate::raw::Random;

/// One attack.
pub(crate) struct Attack {
    /// What the test looks for.
    pub(crate) name: &'static str,
    /// Does it.
    pub(crate) run: fn(&Function, &mut Random),
}

const fn attack(name: &'static str, run: fn(&Function, &mut Random)) -> Attack {
    Attack { name, run }
}

/// All of them, in the order in which they run.
pub(crate) const ALL: &[Attack] = &[
    attack("registers", registers::every_offset_and_width),
    attack("registers-random", registers::random_accesses),
    attack("features", registers::features_never_offered),
    attack("status", registers::status_out_of_order),
    attack("queue-addresses", queues::rings_out_of_range),
    attack("ring-in-ring", queues::rings_in_each_other),
    attack("loops", queues::looped_descriptors),
    attack("descriptors", queues::random_descriptors),
    attack("indirect", queues::indirect_tables),
    attack("index", queues::available_index_that_lies),
    attack("requests", queues::requests_beyond_the_device),
    attack("kicks", queues::storm_of_kicks),
    attack("resets", queues::resets_in_the_middle),
    attack("msix", pci::wild_vectors),
    attack("bars", pci::bars_anywhere),
    attack("window", pci::window_capability),
    attack("configuration", pci::random_configuration),
    attack("hotplug", pci::hotplug_controller),
    attack("ports", pci::random_ports),
    attack("console", pci::console_that_lies),
];
