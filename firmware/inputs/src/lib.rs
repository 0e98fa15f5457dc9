//! What the built-in guest reads from others, as pure parsers: its steps, the config drive,
//! HTTP, JSON and DHCP options.
//!
//! Everything here comes from outside and may be hostile: no input panics, loops for long or
//! grows without a limit. Nothing here does I/O or knows the time. Start at [`steps`].
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod dhcp;
pub mod http;
pub mod iso9660;
pub mod json;
pub mod steps;
