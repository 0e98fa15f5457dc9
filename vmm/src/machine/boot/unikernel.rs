//! Boot protocol of a unikernel, as `abi::boot` states it: image, page tables, parameters.
//!
//! | address | what |
//! |---|---|
//! | 0x1000 | [`BootParams`] |
//! | 0x2000 | device table |
//! | 0x3000 | command line |
//! | 0x1_0000 … 0x8_0000 | page tables |
//! | 0x8_0000 | console ring: header, then 256 KiB |

use super::elf::LoadedElf;
use super::{CMDLINE_BYTES_MAX, IMAGE_START, write};
use crate::machine::memory::{self, Ram};
use crate::machine::{MachineError, vcpu};
use abi::boot::{BOOT_MAGIC, BOOT_VERSION, BootParams, DeviceEntry, PCI_SLOTS};

/// Where [`BootParams`] lie.
pub const PARAMS: u64 = 0x1000;
const DEVICES: u64 = 0x2000;
const CMDLINE: u64 = 0x3000;
/// Console ring header; its bytes follow.
pub const CONSOLE: u64 = 0x8_0000;
/// Bytes of the console ring.
pub const CONSOLE_BYTES: u32 = 256 << 10;
/// Most memory of a unikernel, MiB: what page tables below the console ring can map.
pub const MEMORY_MIB_MAX: u32 = 64 << 10;

/// A loaded image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its first instruction.
    pub entry: u64,
    /// First free byte after it, page aligned.
    pub end: u64,
}

/// Takes an ELF as a unikernel: its entry must lie in it.
pub(crate) fn check(elf: LoadedElf) -> Result<Image, MachineError> {
    let LoadedElf { entry, end, .. } = elf;
    if entry < IMAGE_START || entry >= end {
        return Err(MachineError::Kernel(format!(
            "entry {entry:#x} lies outside of the image, which ends at {end:#x}"
        )));
    }
    Ok(Image { entry, end: end.next_multiple_of(4096) })
}

/// What [`write_parameters`] puts in front of the guest.
pub struct Parameters<'a> {
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// The loaded image.
    pub image: Image,
    /// Command line.
    pub cmdline: &'a str,
    /// Devices there at start.
    pub devices: &'a [DeviceEntry],
    /// TSC frequency.
    pub tsc_hz: u64,
    /// `abi::boot::CPU_*` bits.
    pub cpu_features: u64,
}

/// Writes page tables, parameters, device table, command line and console ring header.
pub fn write_parameters(ram: &Ram, parameters: &Parameters<'_>) -> Result<(), MachineError> {
    if parameters.memory_mib > MEMORY_MIB_MAX {
        return Err(MachineError::Boot(format!(
            "memory_mib: {}; a unikernel takes at most {MEMORY_MIB_MAX}",
            parameters.memory_mib
        )));
    }
    let (ram_low_bytes, ram_high_bytes) = memory::split(parameters.memory_mib);
    super::write_page_tables(ram, (ram_low_bytes, ram_high_bytes))?;
    let clock = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let params = BootParams {
        magic: BOOT_MAGIC,
        version: BOOT_VERSION,
        size: size_of::<BootParams>() as u32,
        ram_low_bytes,
        ram_high_bytes,
        free_start: parameters.image.end,
        tsc_hz: parameters.tsc_hz,
        clock_unix_ns: clock.tv_sec as u64 * 1_000_000_000 + clock.tv_nsec as u64,
        clock_tsc: vcpu::host_tsc(),
        cpu_features: parameters.cpu_features,
        cmdline: CMDLINE,
        console: CONSOLE,
        devices: DEVICES,
        cmdline_len: parameters.cmdline.len() as u32,
        device_count: parameters.devices.len() as u32,
        seed: super::random()?,
    };
    debug_assert!(
        parameters.devices.len() <= PCI_SLOTS && parameters.cmdline.len() <= CMDLINE_BYTES_MAX
    );
    let mut table = Vec::with_capacity(std::mem::size_of_val(parameters.devices));
    for device in parameters.devices {
        table.extend_from_slice(bytes_of(device));
    }
    let console_header = [0, 0, CONSOLE_BYTES, 0].map(u32::to_le_bytes).concat();
    write(ram, PARAMS, bytes_of(&params))?;
    write(ram, DEVICES, &table)?;
    write(ram, CMDLINE, parameters.cmdline.as_bytes())?;
    write(ram, CONSOLE, &console_header)
}

/// The bytes of one of `abi::boot`'s plain structures (`repr(C)`, integers only, no padding).
fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: called for BootParams and DeviceEntry only, which have no padding (tested below).
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_structures_have_no_padding() {
        assert_eq!(size_of::<BootParams>(), 8 + 2 * 4 + 10 * 8 + 2 * 4 + 32);
        assert_eq!(size_of::<DeviceEntry>(), 8 + 2 * 2 + 7 * 4);
    }

    #[test]
    fn an_entry_outside_of_the_image_is_refused() {
        let elf = |entry| LoadedElf { entry, pvh_entry: None, end: IMAGE_START + 0x1001 };
        let image = check(elf(IMAGE_START + 0x1000)).unwrap();
        assert_eq!(image.end, IMAGE_START + 0x2000);
        for entry in [0, IMAGE_START - 1, IMAGE_START + 0x1001, u64::MAX] {
            assert!(check(elf(entry)).is_err());
        }
    }
}
