//! End-to-end tests of trine, through its executable and its APIs alone.
//!
//! The library holds what starts a cloud of three nodes (`xtask conformance` uses it too), torture
//! (`cargo xtask torture`) and the check of histories; the tests lie in `tests/`. Nothing here reaches
//! into the product's modules: what a test sees, a user can see. Only `torture/tap.rs` has `unsafe`.

#![deny(unsafe_code)]

mod cloud;
pub mod linearizability;
pub mod random;
pub mod torture;

use std::path::{Path, PathBuf};

pub use cloud::{Cloud, Options};

/// The build's `trine` executable beside a test's own.
///
/// # Panics
/// Where it was not built: the tests start the product itself.
pub fn trine() -> PathBuf {
    let own = std::env::current_exe().expect("a test knows its executable");
    let profile = own.parent().and_then(Path::parent).expect("it lies in target/PROFILE/deps");
    let trine = profile.join("trine");
    assert!(trine.is_file(), "{} is missing; first: cargo build --bins", trine.display());
    trine
}

/// Whether guests can run here. Where they can't, says so loudly; the caller returns.
pub fn kvm_opens(test: &str) -> bool {
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            eprintln!("SKIPPED {test}: /dev/kvm does not open: {error}");
            false
        }
    }
}
