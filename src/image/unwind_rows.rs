//! [`UnwindRows`]: an ELF file's unwind data as sorted rows, each with a [`Rule`].
//!
//! `.eh_frame` first, as the unwinder of C++ uses it; `.debug_frame` for what it does not cover. Everything in a file may be
//! wrong: what can't be read or has no rule is left without, and said so by [`Rule::UNKNOWN`].

use super::elf::ElfFile;
use crate::unwind_abi::{Bp, Cfa, Rule};
use gimli::{
    BaseAddresses, CfaRule, CieOrFde, CommonInformationEntry, DebugFrame, EhFrame, EndianSlice, LittleEndian,
    Operation, Register, RegisterRule, UnwindContext, UnwindExpression, UnwindSection, UnwindTableRow,
    X86_64,
};
use std::collections::HashMap;

type Bytes<'a> = EndianSlice<'a, LittleEndian>;

/// More rows than the largest libraries have (some millions): a hostile file can't ask for more.
const MOST_ROWS: usize = 1 << 24;
/// Bytes of unwind data that are read at most.
const MOST_BYTES: u64 = 256 << 20;
/// Operations of an expression that is looked into.
const MOST_OPERATIONS: usize = 12;

/// Rows of one file, by ascending address.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct UnwindRows {
    /// Where each row begins: addresses of the file. Each ends where the next one begins.
    starts: Vec<u32>,
    /// What holds there.
    rules: Vec<Rule>,
    /// Rows without a rule though the file has one: it needs what rules can't say.
    beyond: usize,
}

impl UnwindRows {
    /// Those of a file; none where it has no unwind data.
    pub fn of(file: &ElfFile) -> Self {
        let mut found = Found::default();
        if let Some((bytes, addr)) = section(file, ".eh_frame") {
            let mut frames = EhFrame::new(&bytes, LittleEndian);
            frames.set_address_size(8);
            let bases = BaseAddresses::default().set_eh_frame(addr);
            let bases = section_addr(file, ".text").map_or(bases.clone(), |text| bases.set_text(text));
            found.read(&frames, &bases);
        }
        let covered = found.rows.len();
        if let Some((bytes, _)) = section(file, ".debug_frame") {
            let mut frames = DebugFrame::new(&bytes, LittleEndian);
            frames.set_address_size(8);
            let mut more = Found::default();
            more.read(&frames, &BaseAddresses::default());
            found.add_uncovered(more, covered);
        }
        found.finish()
    }

    /// What holds at an address of the file.
    pub fn at(&self, addr: u64) -> Rule {
        let Ok(addr) = u32::try_from(addr) else { return Rule::UNKNOWN };
        let after = self.starts.partition_point(|start| *start <= addr);
        after.checked_sub(1).map_or(Rule::UNKNOWN, |row| self.rules[row])
    }

    /// All of them: where each begins, and what holds there.
    pub fn rows(&self) -> impl Iterator<Item = (u32, Rule)> + '_ {
        self.starts.iter().copied().zip(self.rules.iter().copied())
    }

    /// These, by ascending address.
    pub fn from_rows(rows: impl IntoIterator<Item = (u32, Rule)>) -> Self {
        let mut made = Self::default();
        rows.into_iter().for_each(|(start, rule)| made.push(start, rule));
        made
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// How many have no rule though the file has one.
    pub fn beyond(&self) -> usize {
        self.beyond
    }
}

fn section(file: &ElfFile, name: &str) -> Option<(Vec<u8>, u64)> {
    let section = file.section(name).filter(|section| section.in_file && section.size <= MOST_BYTES)?;
    Some((file.read(section.offset, section.size).ok()?, section.addr.0))
}

fn section_addr(file: &ElfFile, name: &str) -> Option<u64> {
    file.section(name).map(|section| section.addr.0)
}

/// A row as it is found: from where to where, and what holds there (`None`: what rules can't say).
type Row = (u32, u32, Option<Rule>);

#[derive(Default)]
struct Found {
    rows: Vec<Row>,
}

impl Found {
    fn read<'a, S>(&mut self, section: &S, bases: &BaseAddresses)
    where
        S: UnwindSection<Bytes<'a>>,
        S::Offset: Copy + Eq + std::hash::Hash,
    {
        let mut known: HashMap<S::Offset, Option<CommonInformationEntry<Bytes<'a>>>> = HashMap::new();
        let mut context = UnwindContext::new();
        let mut entries = section.entries(bases);
        // Where an entry makes no sense, the next one can't be found either.
        while let Ok(Some(entry)) = entries.next() {
            let CieOrFde::Fde(partial) = entry else { continue };
            let offset = partial.cie_offset();
            let cie = known.entry(offset).or_insert_with(|| section.cie_from_offset(bases, offset).ok());
            let Some(cie) = cie.clone() else { continue };
            let Ok(fde) = partial.parse(|_, _, _| Ok(cie.clone())) else { continue };
            let signal = cie.is_signal_trampoline();
            let Ok(mut table) = fde.rows(section, bases, &mut context) else { continue };
            while let Ok(Some(row)) = table.next_row() {
                let from = u32::try_from(row.start_address());
                let to = u32::try_from(row.end_address().min(u64::from(u32::MAX)));
                if let (Ok(from), Ok(to)) = (from, to)
                    && from < to
                {
                    self.rows.push((
                        from,
                        to,
                        rule(row, cie.return_address_register(), signal, section, &cie),
                    ));
                }
                if self.rows.len() >= MOST_ROWS {
                    return;
                }
            }
        }
    }

    /// Adds rows of what the first `covered` (all there are) say nothing of.
    fn add_uncovered(&mut self, more: Self, covered: usize) {
        self.rows.sort_by_key(|row| row.0);
        let is_covered = |at: u32| {
            let after = self.rows[..covered].partition_point(|row| row.0 <= at);
            after.checked_sub(1).is_some_and(|row| at < self.rows[row].1)
        };
        let more: Vec<Row> = more.rows.into_iter().filter(|row| !is_covered(row.0)).collect();
        self.rows.extend(more);
    }

    fn finish(mut self) -> UnwindRows {
        self.rows.sort_by_key(|row| row.0);
        let beyond = self.rows.iter().filter(|row| row.2.is_none()).count();
        let mut rows = UnwindRows { beyond, ..UnwindRows::default() };
        let mut end = 0;
        for (from, to, rule) in self.rows {
            // Of two that overlap, the one that begins first holds to its end.
            let from = from.max(end);
            if from >= to {
                continue;
            }
            if from > end {
                rows.push(end, Rule::UNKNOWN);
            }
            rows.push(from, rule.unwrap_or(Rule::UNKNOWN));
            end = to;
        }
        if end > 0 {
            rows.push(end, Rule::UNKNOWN);
        }
        rows
    }
}

impl UnwindRows {
    fn push(&mut self, start: u32, rule: Rule) {
        if self.rules.last() == Some(&rule) {
            return;
        }
        if self.starts.last() == Some(&start) {
            self.starts.pop();
            self.rules.pop();
            return self.push(start, rule);
        }
        self.starts.push(start);
        self.rules.push(rule);
    }
}

fn rule<'a, S: UnwindSection<Bytes<'a>>>(
    row: &UnwindTableRow<usize>,
    return_register: Register,
    signal: bool,
    section: &S,
    cie: &CommonInformationEntry<Bytes<'a>>,
) -> Option<Rule> {
    let operations = |expression: &UnwindExpression<usize>| -> Option<Vec<Operation<Bytes<'a>>>> {
        let mut operations = expression.get(section).ok()?.operations(cie.encoding());
        let mut found = Vec::new();
        while let Ok(Some(operation)) = operations.next() {
            found.push(operation);
            if found.len() > MOST_OPERATIONS {
                return None;
            }
        }
        Some(found)
    };
    // Every CIE begins by saying where the return address is; that it is nowhere is said of a thread's first function.
    let returns_to = row.register(return_register)?;
    if returns_to == RegisterRule::Undefined {
        return Rule::new(Cfa::Outermost, Bp::Kept);
    }
    if signal {
        return Rule::new(Cfa::Signal, Bp::Kept);
    }
    if returns_to != RegisterRule::Offset(-8) {
        return None;
    }
    let cfa = match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => match *register {
            X86_64::RSP => Cfa::Sp(u32::try_from(*offset).ok()?),
            X86_64::RBP => Cfa::Bp(u32::try_from(*offset).ok()?),
            _ => return None,
        },
        CfaRule::Expression(expression) => expressed(&operations(expression)?)?,
    };
    let bp = match row.register(X86_64::RBP).unwrap_or(RegisterRule::SameValue) {
        RegisterRule::SameValue => Bp::Kept,
        RegisterRule::Offset(offset) if offset < 0 => Bp::Saved(u32::try_from(-offset).ok()?),
        RegisterRule::Expression(expression) => match &operations(&expression)?[..] {
            [Operation::RegisterOffset { register: X86_64::RBP, offset: 0, .. }] => Bp::AtBp,
            _ => Bp::Lost,
        },
        _ => Bp::Lost,
    };
    Rule::new(cfa, bp)
}

/// The expressions that compilers, linkers and writers of assembly use for a CFA.
fn expressed(operations: &[Operation<Bytes>]) -> Option<Cfa> {
    use Operation::{And, Deref, Ge, Plus, PlusConstant, RegisterOffset, Shl, UnsignedConstant};
    match operations {
        [RegisterOffset { register: X86_64::RBP, offset, .. }, Deref { size: 8, space: false, .. }] => {
            Some(Cfa::AtBp(i32::try_from(*offset).ok()?))
        }
        [
            RegisterOffset { register: X86_64::RSP, offset, .. },
            Deref { size: 8, space: false, .. },
            PlusConstant { value: 8 },
        ] => Some(Cfa::AtSp(i32::try_from(*offset).ok()?)),
        // rsp + 8 + ((rip & 15) >= n) * 8, of all linkers' procedure linkage tables.
        [
            RegisterOffset { register: X86_64::RSP, offset: 8, .. },
            RegisterOffset { register: X86_64::RA, offset: 0, .. },
            UnsignedConstant { value: 15 },
            And,
            UnsignedConstant { value: from },
            Ge,
            UnsignedConstant { value: 3 },
            Shl,
            Plus,
        ] => Some(Cfa::Plt(u32::try_from(*from).ok()?)),
        _ => None,
    }
}
