//! What a guest's devices do, each in a folder of its own. How they are reached is `crate::pci`.

pub mod console;
