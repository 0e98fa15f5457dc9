//! The ACPI tables of an unmodified Linux: what it is not told by the processor or by PCI itself.
//!
//! Hardware-reduced ACPI (ACPI 6.5, section 4.1): no legacy timer, interrupt controller or
//! power management; events come by the generic event device. The DSDT has the PCI host bridge
//! with its slots and the hot-plug controller of `abi::boot`, the serial port and the generation id.

use super::MachineError;
use super::board::{
    HOTPLUG_PIN, IOAPIC_ADDRESS, PORT_RESET, PORT_SERIAL, PORT_SLEEP_CONTROL, PORT_SLEEP_STATUS,
    RESET_VALUE, SERIAL_PIN, SLEEP_TYPE_OFF,
};
use super::memory::Ram;
use abi::boot::{
    HOTPLUG_SIZE, HOTPLUG_START, PCI_ECAM_SIZE, PCI_ECAM_START, PCI_MMIO_START, PCI_SLOTS,
};
use acpi_tables::aml::{
    Acquire, AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Memory32Fixed,
    Method, MethodCall, Mutex, Name, Notify, OpRegion, OpRegionSpace, Package, Path, Release,
    ResourceTemplate, ShiftLeft,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, aml};
use vm_memory::{Bytes, GuestAddress};

/// Where the tables begin.
pub(crate) const ACPI_START: u64 = 0xE_0000;
/// Where what belongs to ACPI ends.
pub(crate) const ACPI_END: u64 = 0x10_0000;
/// The page with the generation id, which changes when a guest is restored from a snapshot.
pub(crate) const GENERATION_PAGE: u64 = ACPI_END - 4096;
/// Where the generation id lies: 40 bytes into its page, as the specification of
/// `VM_Gen_Counter` wants (8-byte aligned, in memory of its own).
const GENERATION_ID: u64 = GENERATION_PAGE + 40;
/// Where a processor of a PC begins, and where Linux jumps to in real mode when it wants a reset and
/// knows no better way: with hardware-reduced ACPI it asks EFI and this first, and not the FADT.
const RESET_VECTOR: u64 = 0xF_FFF0;
/// `mov dx, PORT_RESET; mov al, RESET_VALUE; out dx, al; hlt; jmp $-1`, in real mode.
const RESET_CODE: [u8; 9] =
    [0xBA, PORT_RESET as u8, (PORT_RESET >> 8) as u8, 0xB0, RESET_VALUE, 0xEE, 0xF4, 0xEB, 0xFD];
/// The root of the tables.
pub(crate) const RSDP: u64 = ACPI_START;
const FIRST_TABLE: u64 = ACPI_START + 64;

const OEM_ID: [u8; 6] = *b"TRINE ";
const OEM_TABLE_ID: [u8; 8] = *b"TRINEVMM";
const OEM_REVISION: u32 = 1;
const LAPIC_ADDRESS: u32 = 0xFEE0_0000;
// FADT, "IA-PC Boot Architecture Flags": what a PC has and this machine lacks.
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_CMOS_CLOCK: u16 = 1 << 5;
/// Bus check / device check and eject request (ACPI 6.5, table 5.168).
const NOTIFY_DEVICE_CHECK: u8 = 1;
const NOTIFY_EJECT: u8 = 3;
const MUTEX_WAIT_FOREVER: u16 = 0xFFFF;

/// Writes the tables of a guest with `vcpus` processors, a fresh generation id, and what there is of
/// firmware.
pub(crate) fn write(ram: &Ram, vcpus: u8, generation: [u8; 16]) -> Result<(), MachineError> {
    let put = |address: u64, bytes: &[u8]| {
        ram.write_slice(bytes, GuestAddress(address))
            .map_err(|error| MachineError::Boot(format!("ACPI: {error}")))
    };
    let (root, tables) = build(vcpus)?;
    put(RSDP, &root)?;
    put(FIRST_TABLE, &tables)?;
    put(GENERATION_ID, &generation)?;
    put(RESET_VECTOR, &RESET_CODE)
}

/// The RSDP, and all other tables as they follow from [`FIRST_TABLE`] on.
fn build(vcpus: u8) -> Result<(Vec<u8>, Vec<u8>), MachineError> {
    let mut tables = Vec::new();
    let mut place = |table: &dyn Aml| {
        tables.resize(tables.len().next_multiple_of(16), 0);
        let address = FIRST_TABLE + tables.len() as u64;
        table.to_aml_bytes(&mut tables);
        address
    };
    let dsdt = place(&dsdt());
    let entries = [place(&fadt(dsdt)), place(&madt(vcpus)), place(&mcfg())];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = place(&xsdt);
    let end = FIRST_TABLE + tables.len() as u64;
    if end > GENERATION_PAGE {
        return Err(MachineError::Boot(format!("ACPI tables end at {end:#x}, beyond their place")));
    }
    let mut root = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut root);
    Ok((root, tables))
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup);
    table.iapc_boot_arch = (BOOT_NO_VGA | BOOT_NO_CMOS_CLOCK).into();
    table.reset_reg = port(PORT_RESET);
    table.reset_value = RESET_VALUE;
    table.sleep_control_reg = port(PORT_SLEEP_CONTROL);
    table.sleep_status_reg = port(PORT_SLEEP_STATUS);
    table.hypervisor_vendor_identity = u64::from_le_bytes(*b"TRINEVMM").into();
    table.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let lapics = LocalInterruptController::Address(LAPIC_ADDRESS);
    let mut table = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, lapics);
    for id in 0..vcpus {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, IOAPIC_ADDRESS as u32, 0));
    table
}

fn mcfg() -> MCFG {
    let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.add_ecam(PCI_ECAM_START, 0, 0, 0);
    table
}

fn dsdt() -> Sdt {
    let mut code = Vec::new();
    system_bus(&mut code);
    let off = Package::new(vec![&SLEEP_TYPE_OFF]);
    Name::new("_S5_".into(), &off).to_aml_bytes(&mut code);
    const HEADER_BYTES: u32 = 36;
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&code);
    table
}

/// `\_SB`: every device.
fn system_bus(code: &mut Vec<u8>) {
    let mut devices = Vec::new();
    motherboard(&mut devices);
    serial_port(&mut devices);
    generation_id(&mut devices);
    hotplug_controller(&mut devices);
    host_bridge(&mut devices);
    event_device(&mut devices);
    code.extend(aml::Scope::raw("_SB_".into(), devices));
}

/// Memory that no driver may take: the configuration space of PCI.
fn motherboard(code: &mut Vec<u8>) {
    let ecam = Memory32Fixed::new(true, PCI_ECAM_START as u32, PCI_ECAM_SIZE as u32);
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam])),
        ],
    )
    .to_aml_bytes(code);
}

fn serial_port(code: &mut Vec<u8>) {
    let interrupt = Interrupt::new(true, true, false, false, SERIAL_PIN.into());
    let ports = IO::new(PORT_SERIAL, PORT_SERIAL, 0, 8);
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt, &ports])),
        ],
    )
    .to_aml_bytes(code);
}

fn generation_id(code: &mut Vec<u8>) {
    let (low, high) = (GENERATION_ID as u32, (GENERATION_ID >> 32) as u32);
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"TRNE0001"),
            &Name::new("_CID".into(), &Package::new(vec![&"VMGENCTR", &"VM_Gen_Counter"])),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(code);
}

/// The registers of `abi::boot`: which slots were filled, which are asked back, and letting go.
fn hotplug_controller(code: &mut Vec<u8>) {
    let window = Memory32Fixed::new(true, HOTPLUG_START as u32, HOTPLUG_SIZE as u32);
    let registers = Field::new(
        "HPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        [*b"UP__", *b"DOWN", *b"EJCT"].map(|name| FieldEntry::Named(name, 32)).into(),
    );
    let (up, down) = (Path::new("UP__"), Path::new("DOWN"));
    Device::new(
        "HPCT".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A06")),
            &Name::new("_UID".into(), &"PCI hot-plug"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&window])),
            &OpRegion::new(
                "HPRG".into(),
                OpRegionSpace::SystemMemory,
                &(HOTPLUG_START as u32),
                &12u8,
            ),
            &registers,
            &Mutex::new("LOCK".into(), 0),
            // Lets go of slot Arg0.
            &Method::new(
                "EJEC".into(),
                1,
                true,
                vec![
                    &Acquire::new("LOCK".into(), MUTEX_WAIT_FOREVER),
                    &ShiftLeft::new(&Path::new("EJCT"), &aml::ONE, &Arg(0)),
                    &Release::new("LOCK".into()),
                ],
            ),
            // Tells the drivers what has changed.
            &Method::new(
                "SCAN".into(),
                0,
                true,
                vec![
                    &Acquire::new("LOCK".into(), MUTEX_WAIT_FOREVER),
                    &MethodCall::new("\\_SB_.PCI0.NTFY".into(), vec![&up, &NOTIFY_DEVICE_CHECK]),
                    &MethodCall::new("\\_SB_.PCI0.NTFY".into(), vec![&down, &NOTIFY_EJECT]),
                    &Release::new("LOCK".into()),
                ],
            ),
        ],
    )
    .to_aml_bytes(code);
}

fn slot_name(slot: usize) -> String {
    format!("S{slot:02}_")
}

/// Code that was assembled before.
struct Assembled(Vec<u8>);

impl Aml for Assembled {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// The host bridge with a device for each slot, so that Linux's acpiphp serves them all. There is
/// no `_PRT`: functions interrupt by MSI-X only.
fn host_bridge(code: &mut Vec<u8>) {
    let buses = AddressSpace::new_bus_number(0u16, 0);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_MMIO_START as u32,
        (PCI_ECAM_START - 1) as u32,
        None,
    );
    let mut slots = Vec::new();
    for slot in 1..PCI_SLOTS {
        self::slot(&mut slots, slot);
    }
    notify_slots(&mut slots);
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_SEG".into(), &aml::ZERO),
            &Name::new("_BBN".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&buses, &window])),
            &Assembled(slots),
        ],
    )
    .to_aml_bytes(code);
}

fn slot(code: &mut Vec<u8>, slot: usize) {
    let number = slot as u8;
    Device::new(
        Path::new(&slot_name(slot)),
        vec![
            &Name::new("_SUN".into(), &number),
            &Name::new("_ADR".into(), &((slot as u32) << 16)),
            &Method::new(
                "_EJ0".into(),
                1,
                true,
                vec![&MethodCall::new("\\_SB_.HPCT.EJEC".into(), vec![&number])],
            ),
        ],
    )
    .to_aml_bytes(code);
}

/// `NTFY(slots, event)`: notifies the device of every slot whose bit is set.
fn notify_slots(code: &mut Vec<u8>) {
    let mut body = Vec::new();
    for slot in 1..PCI_SLOTS {
        let mask = 1u32 << slot;
        let chosen = And::new(&aml::ZERO, &Arg(0), &mask);
        let device = Path::new(&slot_name(slot));
        If::new(&chosen, vec![&Notify::new(&device, &Arg(1))]).to_aml_bytes(&mut body);
    }
    Method::new("NTFY".into(), 2, true, vec![&Assembled(body)]).to_aml_bytes(code);
}

/// The generic event device: an interrupt, and what it means.
fn event_device(code: &mut Vec<u8>) {
    let interrupt = Interrupt::new(true, true, false, false, HOTPLUG_PIN.into());
    let scan = MethodCall::new("\\_SB_.HPCT.SCAN".into(), vec![]);
    let pin = HOTPLUG_PIN;
    let is_hotplug = Equal::new(&Arg(0), &pin);
    Device::new(
        "EVNT".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new("_EVT".into(), 1, true, vec![&If::new(&is_hotplug, vec![&scan])]),
        ],
    )
    .to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::VCPUS_MAX;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn address(bytes: &[u8], at: usize) -> usize {
        let mut value = [0; 8];
        value.copy_from_slice(&bytes[at..at + 8]);
        (u64::from_le_bytes(value) - FIRST_TABLE) as usize
    }

    fn table(tables: &[u8], at: usize) -> &[u8] {
        let mut len = [0; 4];
        len.copy_from_slice(&tables[at + 4..at + 8]);
        &tables[at..at + u32::from_le_bytes(len) as usize]
    }

    #[test]
    fn every_table_is_found_from_the_root_with_a_right_checksum() {
        for vcpus in [1, 2, VCPUS_MAX] {
            let (root, tables) = build(vcpus).unwrap();
            assert_eq!((&root[..8], sum(&root[..20]), sum(&root)), (&b"RSD PTR "[..], 0, 0));
            let xsdt = table(&tables, address(&root, 24));
            assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
            let mut names = Vec::new();
            for at in (36..xsdt.len()).step_by(8) {
                let entry = table(&tables, address(xsdt, at));
                assert_eq!(sum(entry), 0, "{:?}", &entry[..4]);
                names.push(entry[..4].to_vec());
                if &entry[..4] == b"FACP" {
                    let dsdt = table(&tables, address(entry, 140));
                    assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
                }
                if &entry[..4] == b"APIC" {
                    assert_eq!(entry.len(), 44 + usize::from(vcpus) * 8 + 12);
                }
            }
            assert_eq!(names, [&b"FACP"[..], b"APIC", b"MCFG"]);
        }
    }
}
