//! From a plan to the hooks of the jump kind: which function's number each has, and where it goes. Pure.

use super::detour::Detour;
use super::error::ProbeError;
use super::function::{Domain, Function, Member};
use super::load::Wanted;
use super::near::Hooked;
use super::plan::Plan;
use crate::addr::RemoteAddr;
use crate::agent_abi::function as id;

/// The hooks of a plan. `code_dealloc`: the word that holds `PyCode_Type.tp_dealloc`, and what it holds.
pub fn wanted(plan: &Plan, code_dealloc: (RemoteAddr, RemoteAddr)) -> Result<Vec<Wanted>, ProbeError> {
    let mut all = Vec::new();
    for entry in &plan.entries {
        all.push(Wanted {
            hooked: Hooked::Body(Detour::plan(entry)?),
            function: number(entry.function),
            near: entry.address,
            module: entry.module.clone(),
        });
    }
    let word = |word, value, function| Wanted {
        hooked: Hooked::Word { word, value },
        function,
        near: word,
        module: String::new(),
    };
    all.extend(plan.words.iter().map(|w| word(w.word, w.value, number(w.function()))));
    all.push(word(code_dealloc.0, code_dealloc.1, id::CODE_DEALLOC));
    Ok(all)
}

/// The number that the agent knows a function by.
pub fn number(function: Function) -> u8 {
    match function {
        Function::Malloc => id::MALLOC,
        Function::Calloc => id::CALLOC,
        Function::Realloc => id::REALLOC,
        Function::Free => id::FREE,
        Function::PosixMemalign => id::POSIX_MEMALIGN,
        Function::AlignedAlloc => id::ALIGNED_ALLOC,
        Function::Memalign => id::MEMALIGN,
        Function::Valloc => id::VALLOC,
        Function::Pvalloc => id::PVALLOC,
        Function::Mmap => id::MMAP,
        Function::Munmap => id::MUNMAP,
        Function::Mremap => id::MREMAP,
        Function::Python(domain, member) => id::PYTHON + 4 * domain_number(domain) + member_number(member),
    }
}

/// The function with this number.
pub fn function(number: u8) -> Option<Function> {
    let known = [
        Function::Malloc,
        Function::Calloc,
        Function::Realloc,
        Function::Free,
        Function::PosixMemalign,
        Function::AlignedAlloc,
        Function::Memalign,
        Function::Valloc,
        Function::Pvalloc,
        Function::Mmap,
        Function::Munmap,
        Function::Mremap,
    ];
    if let Some(function) = known.get(usize::from(number)) {
        return Some(*function);
    }
    let index = number.checked_sub(id::PYTHON).filter(|i| *i < 12)?;
    let domain = [Domain::Raw, Domain::Mem, Domain::Object][usize::from(index / 4)];
    let member = [Member::Malloc, Member::Calloc, Member::Realloc, Member::Free][usize::from(index % 4)];
    Some(Function::Python(domain, member))
}

fn domain_number(domain: Domain) -> u8 {
    match domain {
        Domain::Raw => 0,
        Domain::Mem => 1,
        Domain::Object => 2,
    }
}

fn member_number(member: Member) -> u8 {
    match member {
        Member::Malloc => 0,
        Member::Calloc => 1,
        Member::Realloc => 2,
        Member::Free => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_functions_are_one_to_one() {
        let all: Vec<Function> = (0..=255).filter_map(function).collect();
        assert_eq!(all.len(), 24);
        assert!(all.iter().all(|f| function(number(*f)) == Some(*f)));
    }
}
