//! Boot parameters of a unikernel: the contract between the VMM and the guest.
//!
//! # Entry
//! The VMM loads the ELF's segments (zeroing what has no file content) and starts vCPU 0 at
//! `e_entry` in 64-bit mode at CPL0, with
//! - `rdi` = physical address of [`BootParams`], `rsp` = 0 (the guest brings its own stack);
//! - identity-mapped pages (2 MiB) with the *user* bit set over the RAM and the 3–4 GiB hole,
//!   `cr3` below 1 MiB; `CR4` = PAE | OSFXSR | OSXMMEXCPT, `CR0` = PG | PE | NE | MP | WP, EFER = LME | LMA | SCE | NXE
//!   (no page is NX);
//! - flat segments (code and data), interrupts off, an empty IDT. The guest loads its own GDT,
//!   IDT and TSS (with an all-zero I/O bitmap) and continues at CPL3.
//!
//! The LAPIC is the kernel's (split irqchip); interrupts are MSI. CPL3 code must not use
//! `cpuid` for features: [`BootParams::cpu_features`] has them.
//!
//! # Memory map
//! | address | what |
//! |---|---|
//! | 0x1000 … 0x100000 | boot parameters, page tables, device table, console ring: the VMM's |
//! | 0x100000 … | the ELF; RAM after it is free |
//! | [`PCI_MMIO_START`] | PCI BARs |
//! | [`PCI_ECAM_START`] | PCI configuration space, bus 0 |
//! | [`HOTPLUG_START`] | hot-plug controller |

/// "TRINEBT1", little endian.
pub const BOOT_MAGIC: u64 = u64::from_le_bytes(*b"TRINEBT1");
/// Version of this layout; a guest refuses another.
pub const BOOT_VERSION: u32 = 1;

/// First address of the hole in RAM below 4 GiB; RAM beyond it continues at 4 GiB.
pub const PCI_HOLE_START: u64 = 0xC000_0000;
/// Where the BARs of PCI functions lie: 1 MiB for each slot of bus 0, in slot order.
pub const PCI_MMIO_START: u64 = 0xC000_0000;
/// Bytes of BAR space reserved for each slot.
pub const PCI_MMIO_PER_SLOT: u64 = 0x10_0000;
/// PCI ECAM of bus 0: 1 MiB, 32 slots of 32 KiB (8 functions of 4 KiB).
pub const PCI_ECAM_START: u64 = 0xE000_0000;
/// Bytes of the ECAM window.
pub const PCI_ECAM_SIZE: u64 = 0x10_0000;
/// Number of slots on bus 0 (slot 0 is the host bridge).
pub const PCI_SLOTS: usize = 32;

/// The hot-plug controller (registers of 4 bytes, as in QEMU's ACPI PCI hot-plug).
pub const HOTPLUG_START: u64 = 0xFED0_0000;
/// Bytes of the hot-plug controller's window.
pub const HOTPLUG_SIZE: u64 = 0x1000;
/// Read: bitmap of slots where a device was plugged since the last read; reading clears it.
pub const HOTPLUG_REG_UP: u64 = 0x0;
/// Read: bitmap of slots whose device the host asks back; a bit stays until it is ejected.
pub const HOTPLUG_REG_DOWN: u64 = 0x4;
/// Write: a slot's bit; the guest has let go of the device and it may be removed.
pub const HOTPLUG_REG_EJECT: u64 = 0x8;
/// The vector (edge, fixed, to APIC id 0) that announces a change in UP or DOWN to a unikernel.
pub const HOTPLUG_VECTOR: u8 = 0x30;

/// Write a byte: a boot-timer mark. The VMM records the time of the first write of each value.
pub const PORT_BOOT_TIMER: u16 = 0x500;
/// Write a byte: the guest ends; the value is its exit code (0 = clean power-off).
pub const PORT_EXIT: u16 = 0x501;
/// Write any byte: bytes wait in the console ring.
pub const PORT_CONSOLE: u16 = 0x502;

/// Boot-timer mark: the guest's `main` runs.
pub const MARK_MAIN: u8 = 1;
/// Boot-timer mark: the guest has its address.
pub const MARK_NETWORK: u8 = 2;

/// A CPU feature that CPL3 code may use; bits of [`BootParams::cpu_features`].
pub const CPU_RDRAND: u64 = 1 << 0;
/// SSE4.2 (crc32).
pub const CPU_SSE42: u64 = 1 << 1;
/// AVX2 with the state enabled by the VMM.
pub const CPU_AVX2: u64 = 1 << 2;
/// The TSC counts at a constant rate in every state.
pub const CPU_INVARIANT_TSC: u64 = 1 << 3;
/// The LAPIC timer has TSC-deadline mode.
pub const CPU_TSC_DEADLINE: u64 = 1 << 4;

/// What the guest finds at `rdi`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BootParams {
    /// [`BOOT_MAGIC`].
    pub magic: u64,
    /// [`BOOT_VERSION`].
    pub version: u32,
    /// Size of this structure in bytes, as the VMM knows it.
    pub size: u32,
    /// RAM from address 0 up to the hole, bytes.
    pub ram_low_bytes: u64,
    /// RAM from 4 GiB on, bytes.
    pub ram_high_bytes: u64,
    /// First byte after the loaded ELF, page aligned: free RAM from here to `ram_low_bytes`.
    pub free_start: u64,
    /// TSC frequency in Hz; never 0.
    pub tsc_hz: u64,
    /// Wall clock (ns since 1970) at the TSC value `clock_tsc`.
    pub clock_unix_ns: u64,
    /// See `clock_unix_ns`.
    pub clock_tsc: u64,
    /// `CPU_*` bits.
    pub cpu_features: u64,
    /// Command line: physical address, not terminated.
    pub cmdline: u64,
    /// Console ring: physical address of a [`ConsoleRing`]; its bytes follow it.
    pub console: u64,
    /// Device table: physical address of `device_count` [`DeviceEntry`]s.
    pub devices: u64,
    /// Command line's length in bytes.
    pub cmdline_len: u32,
    /// Number of entries in the device table.
    pub device_count: u32,
    /// Random bytes from the host, fresh at each start.
    pub seed: [u8; 32],
}

/// A virtio-pci function that was there at start; hot-plugged ones are found through ECAM.
///
/// BAR 0 is the only BAR, 64-bit memory, assigned and enabled by the VMM. Offsets are in it.
/// The VMM has also enabled bus mastering and MSI-X: a unikernel touches no configuration space
/// for it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceEntry {
    /// Address of BAR 0.
    pub bar: u64,
    /// Slot on bus 0 (function 0).
    pub slot: u16,
    /// virtio device type (1 net, 2 block, 4 entropy …; virtio 1.2, section 5).
    pub virtio_type: u16,
    /// Offset of the common configuration.
    pub common: u32,
    /// Offset of the notification area.
    pub notify: u32,
    /// `notify_off_multiplier`.
    pub notify_multiplier: u32,
    /// Offset of the ISR status byte.
    pub isr: u32,
    /// Offset of the device configuration.
    pub device: u32,
    /// Offset of the MSI-X table.
    pub msix_table: u32,
    /// Number of MSI-X vectors.
    pub msix_vectors: u32,
}

/// Console output, guest to host. `capacity` bytes (a power of two) follow the header.
///
/// The guest writes bytes at `head % capacity`, then `head`, then [`PORT_CONSOLE`]; the VMM reads
/// up to `head` and stores `tail` before the port write returns, so the guest never waits. The
/// VMM trusts neither field: it reads at most `capacity` bytes, from its own copy of `tail`.
#[repr(C)]
#[derive(Debug)]
pub struct ConsoleRing {
    /// Bytes ever written by the guest (wraps at 2^32).
    pub head: core::sync::atomic::AtomicU32,
    /// Bytes ever read by the VMM (wraps at 2^32).
    pub tail: core::sync::atomic::AtomicU32,
    /// Capacity in bytes, a power of two; the VMM's.
    pub capacity: u32,
    /// Zero.
    pub reserved: u32,
}
