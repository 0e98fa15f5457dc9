//! The boot parameters, checked once at the start and readable from everywhere after.

use crate::OneThread;
#[cfg(not(test))]
use abi::boot::{BOOT_MAGIC, BOOT_VERSION};
use abi::boot::{BootParams, DeviceEntry};

static PARAMETERS: OneThread<Option<&'static BootParams>> = OneThread::new(None);

/// Takes the parameters from the entry stub; `false` where they are not what this guest knows.
///
/// # Safety
/// Called once, before anything else; `address` is what the VMM left in `rdi`.
#[cfg(not(test))]
pub(crate) unsafe fn accept(address: *const BootParams) -> bool {
    // SAFETY: the entry contract: a `BootParams` that nobody changes lies there.
    let parameters = unsafe { &*address };
    if parameters.magic != BOOT_MAGIC || parameters.version != BOOT_VERSION {
        return false;
    }
    // SAFETY: the one thread, and nobody holds a reference to the slot.
    unsafe { *PARAMETERS.as_ptr() = Some(parameters) };
    true
}

/// The boot parameters.
///
/// # Panics
/// Where `start` has not run, which can't happen in a guest.
#[must_use]
pub fn parameters() -> &'static BootParams {
    // SAFETY: written once by `accept` before any reader.
    unsafe { *PARAMETERS.as_ptr() }.expect("start accepts the parameters before guest_main runs")
}

/// The command line; empty where it is not UTF-8.
#[must_use]
pub fn command_line() -> &'static str {
    let parameters = parameters();
    if parameters.cmdline_len == 0 {
        return "";
    }
    // SAFETY: the VMM's promise about `cmdline` and `cmdline_len`.
    let bytes = unsafe {
        core::slice::from_raw_parts(
            parameters.cmdline as *const u8,
            parameters.cmdline_len as usize,
        )
    };
    core::str::from_utf8(bytes).unwrap_or("")
}

/// Is this word on the command line?
#[must_use]
pub fn has_word(word: &str) -> bool {
    command_line().split_ascii_whitespace().any(|candidate| candidate == word)
}

/// The devices that were there at start.
#[must_use]
pub fn devices() -> &'static [DeviceEntry] {
    let parameters = parameters();
    if parameters.device_count == 0 {
        return &[];
    }
    // SAFETY: the VMM's promise about `devices` and `device_count`.
    unsafe {
        core::slice::from_raw_parts(
            parameters.devices as *const DeviceEntry,
            parameters.device_count as usize,
        )
    }
}
