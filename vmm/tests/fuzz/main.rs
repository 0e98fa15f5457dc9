//! Fuzz targets of the VMM: each is a function of bytes and the test of its name. A short run is
//! part of every test run; `cargo xtask fuzz NAME --inputs 1000000` is a long one.

mod board;
mod chains;
mod control;
mod loaders;
mod pci;
mod queues;
mod world;
